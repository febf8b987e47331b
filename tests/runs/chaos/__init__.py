"""Faults from outside, injected by the thousand: python -m tests.runs.chaos --minutes 30 --seed 0 --out runs/chaos

kill    signals at random instants, resumed until the run ends, compared with the run that nobody disturbed
flip    bits flipped, files cut short, zeroed or grown, each through a program that reads the file
mutate  the same with files whose structure is whole and whose entries make no sense
disk    a full disk from the k-th write on, or at that write alone

A case is right where the program did what it does without the fault, in every bit; or said in one sentence why it
cannot. It is wrong where it believed what is damaged, lost work, printed a stack trace, was ended by a signal, hung,
took a gigabyte more, or left a process or a temporary file behind. Files, in the order of a run: __main__.py (budget,
table), verdicts.py (counts, findings), attempts.py (one program, forked from a process that has imported torch),
scenes.py (which program reads and writes what), kills.py, damage.py (bytes), mutations.py (structures), disk.py.
"""
