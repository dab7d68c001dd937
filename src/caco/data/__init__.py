"""Where images are, how their bytes become RGB pixels, and how those become views."""
