"""Weight files of this project and of ten others: read, export, average, describe."""
