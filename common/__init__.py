"""Ground floor: errors, seeds, files, progress and statistics. Importing it never imports torch."""
