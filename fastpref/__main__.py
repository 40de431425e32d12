from fastpref.cli import console

console()
