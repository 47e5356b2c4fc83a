"""A package, so that no package of that name that others have installed takes its place."""
