"""`python -m trivet` is `trivet`; torchrun starts it so."""

from trivet.cli import main

main()
