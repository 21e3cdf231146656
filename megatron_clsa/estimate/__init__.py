"""What a run costs, by formula: parameters, memory, FLOPs, bytes over links. Builds and measures nothing."""
