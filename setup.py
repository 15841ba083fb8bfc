"""The native core; everything else is in pyproject.toml."""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel


class AbiWheel(bdist_wheel):
    """One wheel for every Python from 3.11 on."""

    def finalize_options(self) -> None:
        self.py_limited_api = "cp311"
        super().finalize_options()


HERE = "src/ipckit/_native/"
setup(
    ext_modules=[
        Extension(
            "ipckit._native._core",
            [
                HERE + name
                for name in (
                    "module.c",
                    "glue.c",
                    "py_stream.c",
                    "py_stream_recv.c",
                    "py_stream_send.c",
                    "py_ring.c",
                    "py_ring_recv.c",
                    "py_ring_send.c",
                    "py_claim.c",
                    "py_kernel.c",
                    "py_broadcast.c",
                    "stream.c",
                    "ring.c",
                    "ring_wait.c",
                    "cast_arena.c",
                    "broadcast.c",
                    "broadcast_in.c",
                    "floor.c",
                    "floor_kernel.c",
                    "floor_shared.c",
                    "py_sync.c",
                    "py_mapping.c",
                    "py_mutex.c",
                    "py_crowd.c",
                    "py_condition.c",
                    "py_attempt.c",
                    "lock.c",
                    "sync_object.c",
                    "crowd.c",
                    "crowd_settle.c",
                    "crowd_verbs.c",
                    "py_exporter.c",
                    "py_latest.c",
                    "latest.c",
                )
            ],
            depends=[
                HERE + name
                for name in (
                    "module.h",
                    "layout.h",
                    "ring.h",
                    "ring_words.h",
                    "py_ring.h",
                    "cast_arena.h",
                    "broadcast.h",
                    "stream.h",
                    "py_stream.h",
                    "floor.h",
                    "floor_party.h",
                    "sync_layout.h",
                    "lock.h",
                    "crowd.h",
                    "crowd_words.h",
                    "steps.h",
                    "py_sync.h",
                    "latest_layout.h",
                    "latest.h",
                )
            ],
            define_macros=[("_GNU_SOURCE", "1"), ("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-Wno-missing-field-initializers",
            ],
            extra_link_args=["-lrt", "-pthread"],
            py_limited_api=True,
        )
    ],
    cmdclass={"bdist_wheel": AbiWheel},
)
