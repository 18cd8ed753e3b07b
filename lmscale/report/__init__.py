"""What runs left behind, put side by side: tables and pictures."""
