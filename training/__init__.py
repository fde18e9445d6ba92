"""How the sample models were made. Not part of the installed package."""
