"""Text to calibrate on, for those who have little of their own."""
