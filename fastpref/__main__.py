from fastpref.cli import main

main()
