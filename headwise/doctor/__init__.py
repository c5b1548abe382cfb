"""What is wrong with a running engine: its log, or the server itself, to proven facts; read-only, and without torch."""
