"""What a user takes away: features, an encoder in the format of others, and a page to look at."""
