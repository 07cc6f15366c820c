"""The levels of a check, one file each, in the order of `c2c_export.check_record.LEVELS`."""
