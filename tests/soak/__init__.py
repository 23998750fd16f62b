"""Random calls on several volumes, kills among them, against a model of what must come of it; on a real kernel."""
