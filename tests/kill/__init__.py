"""Kill tests: SIGKILL at any moment loses nothing, and the next start leaves no trace of it."""
