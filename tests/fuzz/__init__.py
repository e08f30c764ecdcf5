"""Problems drawn at random, each held to float64 and to another way of saying the same (`python -m tests.fuzz --help`)."""
