"""What people look at: the page, charts, progress, TensorBoard, words at the terminal."""
