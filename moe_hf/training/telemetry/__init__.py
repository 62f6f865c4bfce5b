"""What training measures besides the loss, where it is shown, and what raises an alarm."""
