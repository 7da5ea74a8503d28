"""The console script ``raydream``: every command of the project under one name, also where there is no checkout."""
