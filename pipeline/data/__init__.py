"""Where tasks come from: image pools, class splits and the episodes drawn from them."""
