"""The private names of Python's own library that both sides read."""

import argparse

from shared.compat import parser_actions


def test_argparse_still_lists_its_arguments():
    parser = argparse.ArgumentParser(add_help=False)
    added = [parser.add_argument("--one"), parser.add_argument("two")]
    assert parser_actions(parser) == added, "CPython has changed ArgumentParser._actions"
