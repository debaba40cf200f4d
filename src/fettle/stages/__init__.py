"""What the pipeline does between the rooms: build candidates, measure them, describe the machine."""
