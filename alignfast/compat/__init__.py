"""Drop-in counterparts of other packages: their names, arguments and numbers over this package's engine."""
