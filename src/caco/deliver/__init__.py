"""What a user takes away: features, and a page to look at."""
