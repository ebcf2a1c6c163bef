"""`accelerate launch -m expertoken.train RECIPE --meta MODEL --data SUPERVISION --out COMPOSITE`."""

from .entry import main

main()
