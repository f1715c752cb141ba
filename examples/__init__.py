"""Programs to copy and change. They read what the project writes, and import nothing of it."""
