"""supervisord's configuration, and the guard, its event listener that restarts processes or ends the part."""
