"""What a run leaves behind and shows: its folder, metrics, checkpoint, plot and progress."""
