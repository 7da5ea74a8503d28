"""What a step costs and where its time goes: one particle alone, and whole runs on Ray."""
