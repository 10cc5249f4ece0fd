"""One update: state, optimizer, schedule and the step."""
