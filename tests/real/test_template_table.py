"""The table of docs/how-to/chat-templates.md says what is done with published templates."""

from tests.real.documented import BEGIN, END, PAGE, table


def test_the_table_of_templates_is_what_is_learned():
    assert PAGE.read_text().partition(BEGIN)[2].partition(END)[0] == table()
