/* placeholder */
typedef int ring_placeholder;
