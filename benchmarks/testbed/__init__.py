"""The testbed: who recovers what, and why, on models small enough for statistics. See PROTOCOL.md and docs/testbed.md."""
