"""One pass a file; each turns one noun of `rpcompile.ir` into the next."""
