"""Reports on training runs: what they have logged, as figures and one HTML page; knows neither torch nor training."""
