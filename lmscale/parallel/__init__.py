"""Who am I among the ranks, and which random numbers are mine."""
