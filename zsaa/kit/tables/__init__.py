"""From result files to tables, ours beside the paper's. Nothing here computes a result."""

from zsaa.kit.tables.controls import controls_table, differences_table
from zsaa.kit.tables.speed import footprint_table, prefill_table, ttft_table
from zsaa.kit.tables.table1 import table_1, table_1_cells
from zsaa.kit.tables.table2 import table_2, table_2_cells, table_2_controls, table_2_settings
from zsaa.kit.tables.table3 import CHANCE, table_3, table_3_cells
from zsaa.kit.tables.table4 import table_4, table_4_cells
from zsaa.kit.tables.text import cells_table, save_table

__all__ = [
    "CHANCE",
    "cells_table",
    "controls_table",
    "differences_table",
    "footprint_table",
    "prefill_table",
    "save_table",
    "table_1",
    "table_1_cells",
    "table_2",
    "table_2_cells",
    "table_2_controls",
    "table_2_settings",
    "table_3",
    "table_3_cells",
    "table_4",
    "table_4_cells",
    "ttft_table",
]
