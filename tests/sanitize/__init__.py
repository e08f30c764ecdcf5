"""The native code under ASan, UBSan and TSan (`python -m tests.sanitize`)."""
