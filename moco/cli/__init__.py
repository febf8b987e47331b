"""The flags of every command and how they are read. No torch here: a wrong flag is answered before a second of
imports."""
