"""What draws: web pages in one file, grids of images, scatter plots, and the colours of all of them."""
