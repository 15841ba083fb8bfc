"""What tests of programs that use ipckit need: real servers without a human, and the conformance suite."""
