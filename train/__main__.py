"""`accelerate launch -m expertoken.train RECIPE --meta MODEL --data SUPERVISION --output_dir COMPOSITE`."""

from .entry import main

main()
