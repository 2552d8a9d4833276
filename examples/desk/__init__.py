"""The order desk: a real service, tasks on it, and the demo that learns its house rules."""
