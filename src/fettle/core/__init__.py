"""The values every stage shares. Imports nothing else of the package, and never torch."""
