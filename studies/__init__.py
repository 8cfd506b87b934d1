"""What is measured, above all else: quality, speed, features, and the paper in miniature."""
