"""The level-triggered loop: fetch, load, compile, observe, plan, publish, apply, status.

Any step may be killed anywhere; the next pass reaches the same fixpoint. Not here: decisions (core),
or how any edge does its work (sources, backends, publish).
"""
