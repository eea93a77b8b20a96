"""Names of other engines' programming interfaces, for files that were written against them."""
