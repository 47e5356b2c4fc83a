"""Who is rank what, and how ranks talk to each other."""
