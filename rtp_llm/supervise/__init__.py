"""supervisord's configuration, and the guard that decides what a lost process means."""
