"""Reports as pages of HTML: of one run while it trains, and of several runs beside one another."""
