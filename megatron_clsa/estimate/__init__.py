"""What a run costs, by formula: parameters, memory, FLOPs, bytes over each link. Builds and measures nothing."""
