"""What a run reports, and where: metrics, their writers, throughput, console, manifest."""
